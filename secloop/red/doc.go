// Package red is the attacking side: plug-ins, bounded in connections, bytes
// and time, that a scenario's stages name. They speak to the battle-field's own
// addresses and to nothing else: the guard in red.go refuses every other one
// before a socket is opened, and in a namespace there is no way out either.
package red
