"""Measuring: quality and speed of the modes, the check layer, and what a device takes for a layer.

What a command measures, a function here measures too: `evaluate.evaluate`, `check_layer.measure_check_layer`,
`bench.bench`, `calibrate.calibrate` and `demo.demo` take a model and keyword arguments, print nothing and return a
record; `tables` makes text of it, and `plots` pictures. `inspection.inspect` looks at one prompt; `inspection_plots`
and `html_report` show it.
"""
