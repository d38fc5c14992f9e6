"""Sound to events: the inner ear, recordings, and the files made of them."""
