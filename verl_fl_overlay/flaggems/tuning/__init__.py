"""Which of FlagGems' operators are faster, measured."""
