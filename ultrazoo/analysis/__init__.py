"""Looking at plans: who can influence a query, cost per layer, several plans side by side."""
