"""What uses both stages: recipes, studies, advice, prediction, diagnostics. The only room that imports both wings."""
