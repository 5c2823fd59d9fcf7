"""Every layer of torch.nn and many operations, each in the smallest model that has it; products through each, judged.

``python -m covered``, with ``tests`` on the path, writes ``docs/coverage.md``.
"""
