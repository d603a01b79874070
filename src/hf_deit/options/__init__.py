"""What a run is told: recipes, the command line, and what Transformers' own options mean here."""
