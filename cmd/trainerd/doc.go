// Command trainerd is the training server and its tools. See `trainerd --help`.
//
// It is flags, configuration and wiring; what it wires lives in the packages.
// main.go has the command tree, program.go the bootable server that tests start
// on port 0, config.go its configuration, demo.go the loop of `make demo`.
package main
