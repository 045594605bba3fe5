package seal

// Mark is embedded by every device, buffer and layout.
type Mark struct{}

// Sealed is the method that outsiders cannot name the type of.
func (Mark) Sealed(Token) {}

// Token is the argument type that closes the interfaces.
type Token struct{}
