"""Figure 11 of the Ladder paper (OSDI'24): the published values that are drawn."""
