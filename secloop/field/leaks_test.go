//go:build field && linux

package field

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"trainerd/secloop/scenario"
)

var leakEpisodes = flag.Int("episodes", 60, "episodes of TestNothingIsLeft")

// superviseVar holds the seed of a supervisor that this executable plays for TestNothingIsLeft.
const superviseVar = "SECLOOP_TEST_SUPERVISOR"

// supervise plays random episodes until it is killed, four at a time, and kills
// about half of its workers at random moments. It writes one line for each episode that ended.
func supervise() {
	seed, err := strconv.ParseUint(os.Getenv(superviseVar), 10, 64)
	if err != nil {
		panic(err)
	}
	f, err := Open(Options{Parallel: 4})
	if err != nil {
		fmt.Println("failed", err)
		os.Exit(1)
	}
	for i := range uint64(4) {
		go func() {
			r := rand.New(rand.NewPCG(seed, i))
			for {
				a := scenario.RandomAlert(r)
				s := scenario.RandomStrategy(r, a)
				ctx, cancel := context.WithCancel(context.Background())
				if r.IntN(2) == 0 {
					ctx, cancel = context.WithTimeout(ctx, time.Duration(r.IntN(300))*time.Millisecond)
				}
				_, err := f.Run(ctx, a, s)
				switch {
				case err == nil:
					fmt.Println("finished")
				case ctx.Err() != nil:
					fmt.Println("killed")
				default:
					fmt.Println("failed", strings.ReplaceAll(err.Error(), "\n", " "))
				}
				cancel()
			}
		}()
	}
	select {}
}

// TestNothingIsLeft lets supervisors play episodes, kills workers and the
// supervisors themselves at random moments (SIGKILL), and compares what the host has
// afterwards with what it had before. Control groups of a killed supervisor
// are removed by the next one that opens, so one opens at the end.
func TestNothingIsLeft(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 2))
	ours := map[string]bool{}
	before := census(t, ours)
	counts := map[string]int{}
	supervisors := 0
	for counts["finished"]+counts["killed"] < *leakEpisodes {
		supervisors++
		lines := 1 + r.IntN(40)
		pid := runSupervisor(t, r.Uint64(), lines, time.Duration(r.IntN(30))*time.Millisecond, counts)
		ours[fmt.Sprintf("of-%d", pid)] = true
		if t.Failed() {
			return
		}
	}
	t.Logf("%d episodes finished, %d killed with their workers, %d supervisors killed with up to 4 under way", counts["finished"], counts["killed"], supervisors)
	if counts["finished"] == 0 || counts["killed"] == 0 {
		t.Error("expected some to finish and some to be killed")
	}
	f, err := Open(Options{Parallel: 1})
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	ours[fmt.Sprintf("of-%d", os.Getpid())] = true
	var after []string
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		after = census(t, ours)
		if cmp.Equal(before, after) || time.Now().After(end) {
			break
		}
	}
	if d := cmp.Diff(before, after); d != "" {
		t.Errorf("left on the host: before -, after +\n%s", d)
	}
}

// runSupervisor starts one, lets that many episodes end and a moment pass, and kills it.
func runSupervisor(t *testing.T, seed uint64, lines int, moment time.Duration, counts map[string]int) (pid int) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", superviseVar, seed))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var kill sync.Once
	end := func() { kill.Do(func() { cmd.Process.Kill() }) }
	watchdog := time.AfterFunc(2*time.Minute, end)
	defer watchdog.Stop()
	n := 0
	for s := bufio.NewScanner(out); s.Scan(); {
		what, rest, _ := strings.Cut(s.Text(), " ")
		counts[what]++
		if what == "failed" {
			t.Errorf("an episode failed: %s", rest)
			end()
		}
		if n++; n == lines {
			time.AfterFunc(moment, end)
		}
	}
	end()
	cmd.Wait()
	if n < lines && !t.Failed() {
		t.Errorf("the supervisor ended after %d episodes, expected %d", n, lines)
	}
	return cmd.Process.Pid
}

// census lists the links, their qdiscs, classes and filters, the mounts and
// nftables tables of this host, the processes and control groups of our fields, and every network namespace that
// a process lives in. What belongs to the fields of other supervisors is passed over.
func census(t *testing.T, ours map[string]bool) []string {
	t.Helper()
	var all []string
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		all = append(all, "link "+l.Name)
	}
	all = append(all, traffic(t)...)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 {
			all = append(all, "mount "+f[4])
		}
	}
	ns, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	conn, err := nftables.New(nftables.WithNetNSFd(int(ns)))
	if err != nil {
		t.Fatal(err)
	}
	tables, err := conn.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		all = append(all, "nftables table "+table.Name)
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		cmdline, _ := os.ReadFile(p + "/cmdline")
		role, of, _ := strings.Cut(strings.TrimRight(string(cmdline), "\x00"), "\x00")
		if strings.HasPrefix(role, rolePrefix) {
			if !ours[of] {
				continue
			}
			all = append(all, "process "+role+" "+of)
		}
		if ns, err := os.Readlink(p + "/ns/net"); err == nil {
			all = append(all, "namespace "+ns)
		}
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + groupParent + "/*-*")
	for _, g := range groups {
		pid, _, _ := strings.Cut(filepath.Base(g), "-")
		if ours["of-"+pid] {
			all = append(all, "group "+g)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// traffic lists what controls the traffic of this host's links.
func traffic(t *testing.T) []string {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, l := range links {
		qdiscs, err := netlink.QdiscList(l)
		if err != nil {
			t.Fatal(err)
		}
		for _, q := range qdiscs {
			all = append(all, fmt.Sprintf("qdisc %s %s of %s", q.Type(), netlink.HandleStr(q.Attrs().Handle), l.Attrs().Name))
		}
		classes, err := netlink.ClassList(l, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range classes {
			all = append(all, fmt.Sprintf("class %s %s of %s", c.Type(), netlink.HandleStr(c.Attrs().Handle), l.Attrs().Name))
			filters, err := netlink.FilterList(l, c.Attrs().Parent)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range filters {
				all = append(all, fmt.Sprintf("filter %s %d of %s", f.Type(), f.Attrs().Handle, l.Attrs().Name))
			}
		}
	}
	return all
}
