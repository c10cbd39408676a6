"""FlagGems: which operators it has here, which of them training may use, and how they take torch's place."""
