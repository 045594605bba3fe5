// Package field is the battle-field out of Linux namespaces. For each episode a
// supervisor (this process, which never enters a namespace) starts a worker in
// new net, pid, mount, ipc and uts namespaces; the worker refuses to run unless
// it is pid 1 and only lo exists. It starts blue and red as processes of their
// own, each in its own network namespace and as an unprivileged user, and joins
// them by veth: red — blue — users (the worker itself). Nothing has a route
// out, a name or a mount on the host; killing the worker takes everything away.
//
// Blue's services are those of secloop/blue on real sockets; its tools are real
// nftables rules and traffic control classes over netlink, and real sysctls. Each
// link carries at most 200 Mbit/s. Red's plug-ins are those of
// secloop/red; red holds CAP_NET_RAW and nothing else, cannot open a file, make
// another kind of socket, execute, or change namespaces (seccomp).
//
// A program that opens a field calls Main first thing in main: the worker, blue
// and red are the same executable started again.
//
// Read supervisor_linux.go, worker_linux.go, team_linux.go; nft_linux.go and tc_linux.go
// for what tools do to the kernel.
package field
