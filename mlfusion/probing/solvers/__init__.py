"""Heads that are solved for, not trained: ridge, logistic regression, nearest neighbours."""
