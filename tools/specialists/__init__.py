"""The parts of `tools.tasks`: texts from packages, trainings of several adapters on one base, and what they are measured by."""
