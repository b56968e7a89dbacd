"""A plugin of pytest's: what becomes of each test, a line of JSON each, written at once: who is cut off has told what ran."""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--notes", type=Path, help="the file for what becomes of each test")


def pytest_configure(config):
    path = config.getoption("notes")
    if path and not hasattr(config, "workerinput"):  # of pytest-xdist's processes the one that hears of all tests
        config.pluginmanager.register(Notes(path))


class Notes:
    def __init__(self, path):
        self.file = path.open("w", buffering=1, encoding="utf-8")

    def note(self, **what):
        self.file.write(json.dumps(what) + "\n")

    def pytest_collection_finish(self, session):
        self.note(chosen=[item.nodeid for item in getattr(session, "items", ())])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        self.note(chosen=list(ids))

    def pytest_collectreport(self, report):
        if report.failed:
            self.note(test=report.nodeid, outcome="failed", why=str(report.longrepr).strip().splitlines()[-1])

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.note(test=report.nodeid, outcome=report.outcome, why=reason(report))
        if report.when == "teardown":
            for kind, text in report.user_properties:
                self.note(says=kind, text=text)


def reason(report):
    """Why a test failed or was skipped, in a line."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash else report.longrepr or "").strip()
    return text.splitlines()[0] if text else ""
