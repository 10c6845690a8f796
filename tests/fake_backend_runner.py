"""Runs backends by a table of seconds, in a process that need not know what they are."""

from __future__ import annotations

import os
import signal


class FakeRunner:
    """`seconds` by backend; `faults` gives what is wrong with some of them."""

    def __init__(self, spec):
        self.seconds, self.faults = spec["seconds"], spec.get("faults", {})

    def prepare(self, config):
        pass

    def check(self, config):
        fault = self.faults.get(config["backend"])
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        return 40.0 if fault == "wrong" else 0.1

    def time(self, config, rounds):
        if self.faults.get(config["backend"]) == "ctrl_c":
            raise KeyboardInterrupt
        return [self.seconds[config["backend"]]] * rounds

    def facts(self):
        return {"device": "fake"}
