"""The parts of a run's report: what is read, the numbers, the panels, and the page. `reinforce_ada.report` is how they are called."""
