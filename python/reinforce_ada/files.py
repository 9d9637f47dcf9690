"""Files and folders that are replaced as a whole: at every moment the old one or the new one is there. Stdlib only."""
