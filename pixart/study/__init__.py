"""Studies and comparisons of runs: plans, trainings as processes of their own, statistics, reports, tables and curves.
Nothing that trains or samples in this process may enter it."""
