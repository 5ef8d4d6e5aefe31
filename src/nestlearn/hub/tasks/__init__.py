"""Tasks for lm-evaluation-harness over local files: no network, and the prompts of `nestlearn.evaluation.zero_shot`."""
