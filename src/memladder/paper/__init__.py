"""Figure 11 of the Ladder paper (OSDI'24): its data, its rows, and its picture."""
