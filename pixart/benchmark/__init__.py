"""Speed: programs that do the same work, ours and others', timed side by side in one run.

Nothing that a user's run depends on may enter it.
"""
