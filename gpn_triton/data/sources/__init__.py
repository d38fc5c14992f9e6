"""Where events come from: files, hosts, and made sets."""
