// Package sim is the battle-field in memory: the services of secloop/blue and
// the plug-ins of secloop/red over pipes, with a model of the packet filter, of
// traffic control and of the kernel's SYN queue where secloop/field has nftables, tc
// and sysctls. It
// needs no privilege and no kernel feature, and the same alert and strategy
// always give the same feedback; a test of secloop/field holds both to each other.
//
// Read sim.go, then network.go.
package sim
