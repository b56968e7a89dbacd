// The float32 constants of FDN1 and of the exponential: those of fastdiff/execution/noise.py and reference.py (a test compares
// them). Polynomials have their highest power first.
#pragma once

namespace {

// -2 ln(1+f)/f on [-1/3, 1/3), and -2 ln 2
constexpr float kLog[9] = {-0x1.1fde88p-2f, 0x1.3b751ep-2f,  -0x1.1e7792p-2f, 0x1.50224cp-2f, -0x1.99d83ap-2f,
                           0x1.00150cp-1f,  -0x1.5554e6p-1f, 0x1.ffffd2p-1f,  -0x1p+1f};
constexpr float kMinusTwoLnTwo = -0x1.62e43p+0f;

// sine (without its last factor t) and cosine of a quarter turn t, in t²
constexpr float kSin[4] = {-0x1.2d9302p-8f, 0x1.465e92p-4f, -0x1.4abbbap-1f, 0x1.921fb6p+0f};
constexpr float kCos[5] = {0x1.d99f54p-11f, -0x1.55c4eap-6f, 0x1.03c1dap-2f, -0x1.3bd3ccp+0f, 0x1p+0f};
constexpr double kQuarters = 0x1.45f306dc9c883p-1;  // quarter turns in a radian, 2/pi

// 1/ln 2, ln 2 in two parts, and Taylor's series of e^r
constexpr float kPerLnTwo = 0x1.715476p+0f, kLnTwoHigh = 0x1.62e3p-1f, kLnTwoLow = 0x1.2fefa4p-17f;
constexpr float kExp[8] = {0x1.a01a02p-13f, 0x1.6c16c2p-10f, 0x1.111112p-7f, 0x1.555556p-5f,
                           0x1.555556p-3f,  0x1p-1f,         0x1p+0f,        0x1p+0f};
// the same for float64, to the 13th power
constexpr double kPerLnTwoWide = 0x1.71547652b82fep+0, kLnTwoHighWide = 0x1.62e42feep-1, kLnTwoLowWide = 0x1.a39ef35793c76p-33;
constexpr double kExpWide[14] = {0x1.6124613a86d09p-33, 0x1.1eed8eff8d898p-29, 0x1.ae64567f544e4p-26,
                                0x1.27e4fb7789f5cp-22, 0x1.71de3a556c734p-19, 0x1.a01a01a01a01ap-16,
                                0x1.a01a01a01a01ap-13, 0x1.6c16c16c16c17p-10, 0x1.1111111111111p-7,
                                0x1.5555555555555p-5, 0x1.5555555555555p-3, 0x1p-1, 0x1p+0, 0x1p+0};

}  // namespace
