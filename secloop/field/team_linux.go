package field

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"trainerd/secloop/blue"
	"trainerd/secloop/red"
	"trainerd/secloop/scenario"
)

// blueRole is the defended side: services, packet filter, kernel parameters.
func blueRole() error {
	var b *blue.Blue
	var ep scenario.Episode
	var filter *filter
	var shaper shaper
	var watch *capture
	var blocked *refusals
	return serve(os.Stdin, os.Stdout, func(op string, arg json.RawMessage) (any, error) {
		switch op {
		case "start":
			if err := json.Unmarshal(arg, &ep); err != nil {
				return nil, err
			}
			for _, s := range initialSysctls {
				if err := setSysctl(s); err != nil {
					return nil, err
				}
			}
			setSysctl(scenario.Sysctl{Key: "net.ipv6.conf.all.disable_ipv6", Value: "1"}) // a kernel without IPv6 has no such key
			var err error
			// A kernel without nfnetlink_log has counters only.
			if ep.Fault != scenario.NoPacketLog {
				blocked, _ = newRefusals()
			}
			if filter, err = newFilter(blocked != nil); err != nil {
				return nil, err
			}
			var programs map[string]blue.Program
			if ep.Real {
				if programs, err = startStores(ep); err != nil {
					return nil, err
				}
				programs["jump1"] = elsewhere{}
			}
			b, err = blue.StartAround(ep, stand{patience: patience}, programs)
			return nil, err
		case "escape":
			return nil, escape(arg)
		}
		if b == nil {
			return nil, errors.New("not started")
		}
		switch op {
		case "apply":
			var a scenario.Action
			if err := json.Unmarshal(arg, &a); err != nil {
				return nil, err
			}
			if ep.Fault == scenario.BlueDies {
				os.Exit(3)
			}
			done := make(chan error, 1)
			go func() {
				if ep.Fault == scenario.ToolHangs {
					select {}
				}
				done <- apply(a, b, filter, &shaper)
			}()
			select {
			case err := <-done:
				return nil, err
			case <-time.After(toolTimeout):
				return nil, fmt.Errorf("%s: hangs, given up after %s", a.Tool, toolTimeout)
			}
		case "watch":
			var err error
			watch, err = newCapture()
			return nil, err
		case "skip", "seen":
			if watch == nil {
				return nil, errors.New("no sensor")
			}
			if op == "seen" {
				return watch.seen()
			}
			var d time.Duration
			if err := json.Unmarshal(arg, &d); err != nil {
				return nil, err
			}
			return nil, watch.skip(d)
		case "denied":
			var from []netip.AddrPort
			if err := json.Unmarshal(arg, &from); err != nil || watch == nil {
				return nil, err
			}
			login, _ := scenario.HostByName("jump1")
			for _, at := range from {
				watch.engine.Denied(at, login.At())
			}
			return nil, nil
		case "tick":
			return b.Tick(context.Background()), nil
		case "settle":
			b.Settle()
			return nil, nil
		case "events":
			refused, err := filter.refused()
			if err != nil {
				return nil, err
			}
			all := append(b.Events(), kernelEvents()...)
			if refused > 0 {
				all = append(all, scenario.Event{Kind: scenario.Refused, Detail: strconv.FormatUint(refused, 10)})
			}
			held, err := shaper.events()
			if err != nil {
				return nil, err
			}
			all = append(all, held...)
			if blocked == nil {
				return all, nil
			}
			who, err := blocked.events()
			return append(all, who...), err
		}
		return nil, fmt.Errorf("unknown request %q", op)
	})
}

// elsewhere is a program that the worker runs, not blue.
type elsewhere struct{}

// Set implements blue.Program.
func (elsewhere) Set(string) error { return nil }

// Stop implements blue.Program.
func (elsewhere) Stop() {}

// toolTimeout bounds one call of a strategy; rules and settings take milliseconds.
const toolTimeout = 5 * time.Second

// initialSysctls make blue's namespace an ordinary, unhardened server.
var initialSysctls = []scenario.Sysctl{
	{Key: "net.core.somaxconn", Value: strconv.Itoa(scenario.Backlog)},
	{Key: "net.ipv4.tcp_max_syn_backlog", Value: strconv.Itoa(scenario.Backlog)},
	{Key: "net.ipv4.tcp_syncookies", Value: "0"},
	{Key: "net.ipv4.tcp_no_metrics_save", Value: "1"}, // a full SYN queue keeps places for clients that are remembered
	{Key: "net.ipv4.conf.all.rp_filter", Value: "0"},
	{Key: "net.ipv4.ip_forward", Value: "0"},
	{Key: "net.ipv4.ip_unprivileged_port_start", Value: "0"},
}

// apply makes an action's effects real and reads each of them back.
func apply(a scenario.Action, b *blue.Blue, f *filter, t *shaper) error {
	for _, e := range a.Effects {
		switch {
		case e.Rule != nil:
			if err := f.add(*e.Rule, a.Tool); err != nil {
				return fmt.Errorf("%s: %w", a.Tool, err)
			}
		case e.Sysctl != nil:
			if !slices.Contains(scenario.Sysctls, e.Sysctl.Key) {
				return fmt.Errorf("%s: %s is not to be set", a.Tool, e.Sysctl.Key)
			}
			if err := setSysctl(*e.Sysctl); err != nil {
				return fmt.Errorf("%s: %w", a.Tool, err)
			}
		case e.Setting != nil:
			if err := b.Set(*e.Setting); err != nil {
				return fmt.Errorf("%s: %w", a.Tool, err)
			}
			if !b.Is(e.Setting.Host, e.Setting.Name) {
				return fmt.Errorf("%s: setting %s of %s did not hold", a.Tool, e.Setting.Name, e.Setting.Host)
			}
		case e.Shape != nil:
			if err := t.limit(*e.Shape); err != nil {
				return fmt.Errorf("%s: %w", a.Tool, err)
			}
		}
	}
	return nil
}

// setSysctl writes a parameter of this process's network namespace and reads it back.
func setSysctl(s scenario.Sysctl) error {
	path := filepath.Join("/proc/sys", strings.ReplaceAll(s.Key, ".", "/"))
	if err := os.WriteFile(path, []byte(s.Value), 0); err != nil {
		return fmt.Errorf("set %s: %w", s.Key, err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read %s: %w", s.Key, err)
	}
	if strings.TrimSpace(string(got)) != s.Value {
		return fmt.Errorf("set %s: reads %q, expected %q", s.Key, strings.TrimSpace(string(got)), s.Value)
	}
	return nil
}

// kernelEvents reads the namespace's counters: SYNs that found a full queue.
func kernelEvents() []scenario.Event {
	text, err := os.ReadFile("/proc/net/netstat")
	if err != nil {
		return nil
	}
	var names []string
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != "TcpExt:" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		i := slices.Index(names, "TCPReqQFullDrop")
		if i > 0 && i < len(f) && f[i] != "0" {
			return []scenario.Event{{Kind: scenario.SynOverflow, Detail: f[i]}}
		}
	}
	return nil
}

// redRole is the attacking side.
func redRole() error {
	var r *red.Red
	var fault scenario.Fault
	return serve(os.Stdin, os.Stdout, func(op string, arg json.RawMessage) (any, error) {
		if op == "start" {
			var ep scenario.Episode
			if err := json.Unmarshal(arg, &ep); err != nil {
				return nil, err
			}
			if err := confined(); err != nil {
				return nil, err
			}
			fault = ep.Fault
			r = red.New(ep, stand{patience: patience})
			return nil, nil
		}
		if op == "escape" {
			return nil, escape(arg)
		}
		if r == nil {
			return nil, errors.New("not started")
		}
		i := 0
		if op == "prepare" || op == "run" {
			if err := json.Unmarshal(arg, &i); err != nil {
				return nil, err
			}
		}
		switch op {
		case "prepare":
			return nil, r.Prepare(i)
		case "run":
			if fault == scenario.RedDies {
				os.Exit(3)
			}
			return r.Run(context.Background(), i), nil
		case "release":
			r.Release()
			return nil, nil
		case "visit":
			var v scenario.Visit
			if err := json.Unmarshal(arg, &v); err != nil {
				return nil, err
			}
			r.Visit(context.Background(), v)
			return nil, nil
		}
		return nil, fmt.Errorf("unknown request %q", op)
	})
}

// confined checks where red stands, drops what it could still do, and checks
// that it did: only its own link, no way out, no file, no other namespace.
func confined() error {
	links, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		if l.Name != "lo" && l.Name != "red0" {
			return fmt.Errorf("refuse to run: link %s", l.Name)
		}
	}
	if err := lockDown(); err != nil {
		return fmt.Errorf("lock down: %w", err)
	}
	if c, err := net.DialTimeout("tcp4", "192.0.2.1:9", 5*time.Second); !errors.Is(err, unix.ENETUNREACH) {
		if c != nil {
			c.Close()
		}
		return fmt.Errorf("refuse to run: there is a way out (%v)", err)
	}
	if _, err := os.Open("/proc/self/exe"); err == nil {
		return errors.New("refuse to run: files can be opened")
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("refuse to run: unshare answers %v", err)
	}
	return nil
}

// escape tries to reach addresses that must not be reachable, past every guard.
func escape(arg json.RawMessage) error {
	var canaries []string
	if err := json.Unmarshal(arg, &canaries); err != nil {
		return err
	}
	for _, at := range canaries {
		network := "tcp"
		if strings.HasPrefix(at, "/") || strings.HasPrefix(at, "@") {
			network = "unix"
		}
		if c, err := net.DialTimeout(network, at, 2*time.Second); err == nil {
			c.Close()
			return fmt.Errorf("escaped to %s", at)
		}
	}
	return nil
}
