"""The figures, written in Vega-Lite by Altair: one specification serves the page and the files of a paper."""
