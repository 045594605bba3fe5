package field

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"trainerd/secloop/blue"
	"trainerd/secloop/scenario"
)

// Users of blue and red; neither can signal the other.
const (
	blueUser = 65533
	redUser  = 65534
)

// worker is pid 1 of an episode's namespaces. It plays one episode and ends when
// its supervisor does.
func worker() error {
	if err := isolated(); err != nil {
		return err
	}
	ground, err := prepare()
	if err != nil {
		return err
	}
	return serve(os.Stdin, os.Stdout, func(op string, arg json.RawMessage) (any, error) {
		switch op {
		case "ready":
			return nil, nil
		case "check":
			var a scenario.Action
			if err := json.Unmarshal(arg, &a.Effects); err != nil {
				return nil, err
			}
			w, err := ground.build(scenario.Episode{Target: scenario.Hosts()[0], Scenario: "port_scan", Stray: netip.MustParseAddr("198.18.0.55"), Sources: [3]netip.Addr{
				netip.MustParseAddr("198.18.0.10"), netip.MustParseAddr("198.18.0.40"), netip.MustParseAddr("198.18.0.70")}})
			if err != nil {
				return nil, err
			}
			a.Tool = "check"
			return nil, w.blue.call("apply", a, nil)
		case "play":
			var e episode
			if err := json.Unmarshal(arg, &e); err != nil {
				return nil, err
			}
			w, err := ground.build(e.Episode)
			if err != nil {
				return nil, err
			}
			if err := w.tryEscapes(e.Canary); err != nil {
				return nil, err
			}
			w.pace = e.Pace / time.Duration(len(w.listens))
			return scenario.Play(context.Background(), e.Episode, e.Strategy, w)
		case "observe":
			var o observation
			if err := json.Unmarshal(arg, &o); err != nil {
				return nil, err
			}
			w, err := ground.build(o.Episode)
			if err != nil {
				return nil, err
			}
			if err := w.tryEscapes(o.Canary); err != nil {
				return nil, err
			}
			return w.observe(o.Seed)
		}
		return nil, fmt.Errorf("unknown request %q", op)
	})
}

// isolated makes sure that nothing of the host can be touched, or fails.
func isolated() error {
	if os.Getpid() != 1 {
		return errors.New("refuse to run: not the first process of a pid namespace")
	}
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	if len(links) != 1 || links[0].Attrs().Name != "lo" {
		return fmt.Errorf("refuse to run: %d links, expected lo alone", len(links))
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := unix.Mount("tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=1m"); err != nil {
		return fmt.Errorf("mount /tmp: %w", err)
	}
	for _, l := range []struct {
		what  int
		limit uint64
	}{{unix.RLIMIT_NOFILE, 2048}, {unix.RLIMIT_CORE, 0}, {unix.RLIMIT_FSIZE, 1 << 20}, {unix.RLIMIT_CPU, 60}} {
		if err := unix.Setrlimit(l.what, &unix.Rlimit{Cur: l.limit, Max: l.limit}); err != nil {
			return fmt.Errorf("set rlimit %d: %w", l.what, err)
		}
	}
	return nil
}

// workerField implements scenario.Sides over the processes of blue and red.
type workerField struct {
	ep        scenario.Episode
	blue, red *peer
	listens   map[int]bool
	redGone   bool
	pace      time.Duration // that a stage takes at least
	users     stand
	login     *sshd // nil where blue's own login serves
}

// ground is what every battle-field has, whatever is played on it: the
// processes of blue and red, wired up.
type ground struct {
	bluePeer, redPeer *peer
	bluePid           int
	blue, red, users  *netlink.Handle
}

// prepare starts blue and red and wires them up; it does not need to know the episode.
func prepare() (*ground, error) {
	bluePid, bluePeer, err := team(roleBlue, blueUser, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW)
	if err != nil {
		return nil, err
	}
	redPid, redPeer, err := team(roleRed, redUser, unix.CAP_NET_RAW)
	if err != nil {
		return nil, err
	}
	g := &ground{bluePeer: bluePeer, redPeer: redPeer, bluePid: bluePid}
	if err := g.wire(bluePid, redPid); err != nil {
		return nil, fmt.Errorf("wire battle-field: %w", err)
	}
	return g, nil
}

// build gives red the episode's addresses and lets both sides get ready.
func (g *ground) build(ep scenario.Episode) (*workerField, error) {
	w := &workerField{ep: ep, blue: g.bluePeer, red: g.redPeer, listens: map[int]bool{}, users: stand{patience: patience}}
	if err := g.settle(ep); err != nil {
		return nil, fmt.Errorf("wire battle-field: %w", err)
	}
	if err := w.blue.call("start", ep, nil); err != nil {
		return nil, fmt.Errorf("start blue: %w", err)
	}
	if ep.Real {
		var err error
		if w.login, err = startLogin(ep, g.bluePid); err != nil {
			return nil, err
		}
	}
	if err := w.red.call("start", ep, nil); err != nil {
		return nil, fmt.Errorf("start red: %w", err)
	}
	for i, st := range ep.Chain() {
		w.listens[i] = scenario.Waits(st.Plugin)
	}
	return w, nil
}

// team starts a side in its own network and ipc namespace, with the capabilities that it needs.
func team(role string, uid uint32, capabilities ...uintptr) (pid int, p *peer, err error) {
	inR, inW, err := os.Pipe()
	if err != nil {
		return 0, nil, err
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		return 0, nil, err
	}
	cmd := again(role, inR, outW, nil)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWNET | unix.CLONE_NEWIPC,
		Credential:  &syscall.Credential{Uid: uid, Gid: uid},
		AmbientCaps: capabilities,
	}
	if err := cmd.Start(); err != nil {
		return 0, nil, fmt.Errorf("start %s: %w", role, err)
	}
	inR.Close()
	outW.Close()
	return cmd.Process.Pid, newPeer(inW, outR), nil
}

// wire joins red and the users to blue by one veth pair each. A veth is created
// straight between the namespaces: nothing of it ever has a name elsewhere.
func (g *ground) wire(bluePid, redPid int) error {
	b, err := handleOf(bluePid)
	if err != nil {
		return err
	}
	r, err := handleOf(redPid)
	if err != nil {
		return err
	}
	u, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	g.blue, g.red, g.users = b, r, u
	red := netlink.NewLinkAttrs()
	red.Name, red.Namespace = "red0", netlink.NsPid(redPid)
	users := netlink.NewLinkAttrs()
	users.Name = "user0"
	for _, v := range []*netlink.Veth{
		{LinkAttrs: red, PeerName: "blue0", PeerNamespace: netlink.NsPid(bluePid)},
		{LinkAttrs: users, PeerName: "blue1", PeerNamespace: netlink.NsPid(bluePid)},
	} {
		if err := u.LinkAdd(v); err != nil {
			return fmt.Errorf("add veth %s: %w", v.Name, err)
		}
	}
	var hostAddrs []netip.Prefix
	for _, h := range scenario.Hosts() {
		hostAddrs = append(hostAddrs, netip.PrefixFrom(h.Addr, 32))
	}
	var userAddrs []netip.Prefix
	for _, a := range scenario.UserAddrs() {
		userAddrs = append(userAddrs, netip.PrefixFrom(a, 24))
	}
	for _, l := range []struct {
		h     *netlink.Handle
		name  string
		addrs []netip.Prefix
	}{
		{b, "lo", hostAddrs}, {b, "blue0", []netip.Prefix{netip.PrefixFrom(scenario.RedGate, 24)}},
		{b, "blue1", []netip.Prefix{netip.PrefixFrom(scenario.UserGate, 24)}},
		{r, "lo", nil}, {r, "red0", nil}, {u, "lo", nil}, {u, "user0", userAddrs},
	} {
		link, err := l.h.LinkByName(l.name)
		if err != nil {
			return fmt.Errorf("find %s: %w", l.name, err)
		}
		for _, a := range l.addrs {
			if err := l.h.AddrAdd(link, &netlink.Addr{IPNet: ipNet(a)}); err != nil {
				return fmt.Errorf("give %s to %s: %w", a, l.name, err)
			}
		}
		if l.name != "lo" {
			if err := bound(l.h, link); err != nil {
				return err
			}
		}
		if err := l.h.LinkSetUp(link); err != nil {
			return fmt.Errorf("set %s up: %w", l.name, err)
		}
	}
	// The kernel carries packets only after its own housekeeping has seen the link
	// come up; an address request that is lost before is repeated after a second.
	for _, l := range []struct {
		h    *netlink.Handle
		name string
	}{{b, "blue0"}, {b, "blue1"}, {r, "red0"}, {u, "user0"}} {
		if err := awaitUp(l.h, l.name); err != nil {
			return err
		}
	}
	return nil
}

// settle gives red its addresses and makes the routes.
func (g *ground) settle(ep scenario.Episode) error {
	link, err := g.red.LinkByName("red0")
	if err != nil {
		return fmt.Errorf("find red0: %w", err)
	}
	for _, a := range append(ep.Sources[:], ep.Stray) {
		if err := g.red.AddrAdd(link, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, 24))}); err != nil {
			return fmt.Errorf("give %s to red0: %w", a, err)
		}
	}
	for _, route := range []struct {
		h       *netlink.Handle
		to      netip.Prefix
		gateway netip.Addr
	}{
		{g.red, scenario.HostNet, scenario.RedGate}, {g.users, scenario.HostNet, scenario.UserGate},
		{g.blue, scenario.SpoofNet, ep.Sources[0]}, // answers to forged sources end at red, which drops them
	} {
		if err := route.h.RouteAdd(&netlink.Route{Dst: ipNet(route.to), Gw: route.gateway.AsSlice()}); err != nil {
			return fmt.Errorf("route %s: %w", route.to, err)
		}
	}
	return nil
}

func awaitUp(h *netlink.Handle, name string) error {
	for end := time.Now().Add(3 * time.Second); ; time.Sleep(500 * time.Microsecond) {
		link, err := h.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if link.Attrs().OperState == netlink.OperUp {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s is %s after 3 s, expected up", name, link.Attrs().OperState)
		}
	}
}

func handleOf(pid int) (*netlink.Handle, error) {
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return nil, fmt.Errorf("open network namespace of %d: %w", pid, err)
	}
	defer ns.Close()
	return netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}

// Apply implements scenario.Sides.
func (w *workerField) Apply(_ context.Context, a scenario.Action) error {
	if err := w.blue.call("apply", a, nil); err != nil || w.login == nil {
		return err
	}
	for _, e := range a.Effects {
		if e.Setting != nil && e.Setting.Host == w.login.host.Name {
			if err := w.login.set(w.ep, e.Setting.Name); err != nil {
				return fmt.Errorf("%s: %w", a.Tool, err)
			}
		}
	}
	return nil
}

// Attack implements scenario.Sides. A side that dies has lost its stage, not the episode's field.
func (w *workerField) Attack(_ context.Context, i int) (scenario.Result, error) {
	var r scenario.Result
	if w.pace > 0 {
		defer func(start time.Time) { time.Sleep(w.pace - time.Since(start)) }(time.Now())
	}
	if w.redGone {
		r.Error = "red is gone"
		return r, nil
	}
	if w.listens[i] {
		if err := w.red.call("prepare", i, nil); err != nil {
			return w.lost(err)
		}
		came := false
		if err := w.blue.call("tick", nil, &came); err != nil {
			return r, err
		}
		if !came {
			r.Error = "nobody came"
			return r, nil
		}
	}
	if err := w.red.call("run", i, &r); err != nil {
		return w.lost(err)
	}
	return r, nil
}

// lost is what becomes of a stage that red did not finish: an error that red
// reports ends the episode, red's end only the attack.
func (w *workerField) lost(err error) (scenario.Result, error) {
	var said remoteError
	if errors.As(err, &said) {
		return scenario.Result{}, err
	}
	w.redGone = true
	return scenario.Result{Error: fmt.Sprintf("red is gone: %v", err)}, nil
}

// Release implements scenario.Sides.
func (w *workerField) Release(context.Context) error {
	if !w.redGone {
		if err := w.red.call("release", nil, nil); err != nil {
			return err
		}
	}
	return w.blue.call("settle", nil, nil)
}

// tryEscapes fails when blue or red reaches one of the canaries.
func (w *workerField) tryEscapes(canaries []string) error {
	if len(canaries) == 0 {
		return nil
	}
	for name, p := range map[string]*peer{"blue": w.blue, "red": w.red} {
		if err := p.call("escape", canaries, nil); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if w.login != nil {
		return w.login.tryEscapes(canaries, w.users)
	}
	return nil
}

// observe plays the chain before the sensor, which listens before red does anything.
func (w *workerField) observe(seed uint64) (watched, error) {
	var got watched
	if err := w.blue.call("watch", nil, nil); err != nil {
		return got, fmt.Errorf("start sensor: %w", err)
	}
	if err := scenario.Observe(context.Background(), w.ep, seed, w); err != nil {
		return got, err
	}
	err := w.blue.call("seen", nil, &got)
	return got, err
}

// Visit implements scenario.Watched.
func (w *workerField) Visit(ctx context.Context, v scenario.Visit) error {
	if scenario.RedNet.Contains(v.From) {
		return w.red.call("visit", v, nil)
	}
	if w.login != nil && v.To == w.login.host.At() && v.Say != "" {
		w.login.visit(w.users, v)
		return nil
	}
	blue.Visit(ctx, w.users, v)
	return nil
}

// Skip implements scenario.Watched.
func (w *workerField) Skip(_ context.Context, d time.Duration) error {
	if w.login != nil { // what the sensor cannot read on the wire, it learns from the log
		from, err := w.login.denied()
		if err != nil {
			return err
		}
		if err := w.blue.call("denied", from, nil); err != nil {
			return err
		}
	}
	return w.blue.call("skip", d, nil)
}

// Users implements scenario.Sides; the users stand in the worker's own namespace.
func (w *workerField) Users(ctx context.Context, host string, n int, pressure bool) (int, error) {
	h, ok := scenario.HostByName(host)
	if !ok {
		return 0, fmt.Errorf("unknown host %q", host)
	}
	users := w.users
	if pressure {
		users.patience = pressedPatience
	}
	if w.login != nil && h.Name == w.login.host.Name {
		return w.login.users(users, n), nil
	}
	return blue.Users(ctx, users, h, n), nil
}

// Events implements scenario.Sides.
func (w *workerField) Events(context.Context) ([]scenario.Event, error) {
	var e []scenario.Event
	err := w.blue.call("events", nil, &e)
	if err == nil && w.login != nil {
		var from []netip.AddrPort
		from, err = w.login.denied()
		for _, at := range from {
			e = append(e, scenario.Event{Kind: "login_failed", Source: at.Addr().String(), Host: w.login.host.Name, Detail: "sshd"})
		}
	}
	return e, err
}
