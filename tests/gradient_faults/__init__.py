"""Models with one planted fault each, the same models repaired, and healthy models that look suspicious."""
