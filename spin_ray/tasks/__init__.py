"""Tasks of lm-evaluation-harness, answered by the samplers. The only place that imports lm_eval, and only where `eval.tasks` names a task.

found.py (which tasks) -> harness.py (ready at the door, then asked of each version) -> model.py (a model to the harness) -> asking.py (the
pool's answers); numbers.py has what comes out.
"""
