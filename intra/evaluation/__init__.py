"""How good a ranking and an answer are: metrics, intervals, answers, results and the report."""
