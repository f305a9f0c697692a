"""What frameworks' files share: the interface (`base`), and code for several of one library."""
