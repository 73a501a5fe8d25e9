"""Stands for the library wandb, and writes to the file $NOTES what it is told, a line of JSON for each call."""

import json
import os


def note(*what):
    with open(os.environ["NOTES"], "a") as f:
        f.write(json.dumps(what) + "\n")


class Run:
    id = "run-7"

    def log(self, row):
        note("log", row)

    def define_metric(self, *names, **options):
        note("define", names, options)


def init(**options):
    if options["project"] == "closed":
        raise RuntimeError("api_key not configured")
    note("init", {name: options[name] for name in ("project", "name", "id", "resume")}, options["config"]["n_layer"])
    return Run()
