// Package blue is the defended side: services in pure Go that keep their flaws
// in memory. The web application's database is a table in this process, its
// files are a map, its interpreter knows two words: an attack that succeeds
// learns the episode's secret and nothing else. No service touches a file, a
// process or an address outside the battle-field.
//
// The services run over a scenario.Stand: real sockets in a namespace
// (secloop/field) or pipes (secloop/sim). Read blue.go, then web.go and the
// other services; users.go is the legitimate client.
package blue
