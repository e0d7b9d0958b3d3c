"""A pretrained model adapted in many ways on one GPU, and what is measured of it: jobs for `experiments.run`.

    python -m experiments.adapted.pack --gguf MODEL.gguf --tokens TOKENS --books VALIDATION --out PIECES
    python -m experiments.adapted --packed PACKED --work WORK --out OUT --seconds 900
    python -m experiments.adapted --packed PACKED --work WORK --out OUT --seconds 900 --rehearse --gpus 0 --only swa

Every question is a module with a function `jobs(plan)`, named in `__main__.PARTS`. It adds jobs to the `plan.Plan`:

    def jobs(plan: Plan) -> None:
        plan.model("recall-mix", 1, data=plan.data / "recall")             # trained like "first-order", evaluated
        result = plan.result_of("needle-swa", "needle")                     # WORK/results/needle-swa/needle.json
        command = Command(("needle", str(plan.run_of("swa")), "--json", str(result)), result)
        plan.job("needle-swa", 1, [command], needs=("swa",), seconds=30)    # seconds beside one other job

A command is what `longread` takes, or ("-m", MODULE, ...) for the `main(arguments)` of a module; it is left out where
the file that it makes is there. Every JSON file below WORK/results comes back, with logs and metrics. Which models and
data there are, and what tiers mean, is in `plan`. In a rehearsal `plan.rehearsed` is true: a model of 30 tiny blocks,
a window of 64 tokens (`plan.unit`), 2 steps, on a CPU.
"""
