"""fastdiff: score-based diffusion models, every sampler one table of affine rows."""
