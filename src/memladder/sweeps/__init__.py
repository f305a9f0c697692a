"""Which cases, in what order; measured one after the other; kept in a store that resumes."""
