"""Workflows over both stages: recipes, studies, advice, prediction, diagnostics. No other package imports both stages."""
