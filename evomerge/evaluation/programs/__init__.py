"""Gets programs that models wrote and gives which of them passed their tests; runs none in a process of ours."""
