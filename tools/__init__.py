"""Commands on top of the five chapters: `python -m tools.NAME`, each with its --help.

The room's law: a tool may use everything, and nothing but another tool uses a tool.
"""
