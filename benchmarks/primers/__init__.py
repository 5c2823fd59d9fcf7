"""Pictures of docs/damping.md, step.md and newton.md, measured on small problems: ``python -m benchmarks.primers``."""
