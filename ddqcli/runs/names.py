"""The files of a run folder.

runs/20260131-142310-resnet20/
    recipe.yaml     the resolved recipe, with every default written out
    metrics.jsonl   one JSON object a line: metrics of training steps, and snapshots of the tensors
    last.pt         the last training state, for resuming
    final.pt        the quantized model (indices, levels, gates, float remainder), and the float
                    weights behind it
    report.json     the figures of `ddq report`; written last, so it marks a finished run
    .ddq, .lock     the marker that ddq made this folder, and the lock of the process that writes

A sweep over several targets is a folder of runs, one for each target, with
    sweep.yaml      the resolved recipe with all targets
    sweep.json      the table; written last
    size-accuracy.png and .svg
"""

from __future__ import annotations

RUNS = "runs"  # the folder for runs that are not given one
REPORT = "report.json"
RECIPE = "recipe.yaml"
SWEEP = "sweep.json"
SWEEP_RECIPE = "sweep.yaml"
SWEEP_PICTURE = "size-accuracy"
METRICS = "metrics.jsonl"
LAST = "last.pt"
FINAL = "final.pt"
LOCK = ".lock"
MARKER = ".ddq"
OWN_FILES = (RECIPE, SWEEP_RECIPE, METRICS, LAST, FINAL, REPORT, SWEEP, LOCK, MARKER)
