"""Optimizers and schedules: the optimizer owns fp32 master weights, the schedule is a function of the step."""
