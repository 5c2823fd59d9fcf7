"""Pictures of docs/damping.md, docs/step.md and docs/newton.md, measured on small networks and functions: ``python -m benchmarks.primers``."""
