"""Which versions and extras is the package installed and tested with? `make test-matrix` runs the cells; docs/install.md has the table."""
