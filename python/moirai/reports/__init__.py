"""Reports: dataclasses in, strings out; they read and write nothing themselves."""
