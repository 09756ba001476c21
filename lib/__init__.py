"""What the five chapters stand on: model folders, runs, processes, scores, states.

The room's law: nothing here is a command, and nothing here is needed to see the idea.
"""
