"""The neurons: specification, operator, layers, networks, and what their work costs."""
