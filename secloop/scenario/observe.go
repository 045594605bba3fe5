package scenario

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"
)

// Visit is one connection of somebody who is not part of the incident: a user,
// or a stray scanner. An empty Say connects and hangs up.
type Visit struct {
	From netip.Addr
	To   netip.AddrPort
	Say  string
}

// Watched is an undefended battle-field with a sensor on its traffic.
type Watched interface {
	// Attack runs stage i of the chain. Pressure that the stage built up stays until Release.
	Attack(ctx context.Context, i int) (Result, error)
	Release(ctx context.Context) error
	Visit(ctx context.Context, v Visit) error
	// Skip moves the sensor's clock on: what lies between two steps of an incident is not waited for.
	Skip(ctx context.Context, d time.Duration) error
}

// Observe plays an incident's chain among background noise. The seed decides on
// the noise, the repetitions and the pace; the same seed makes the same steps on every field.
func Observe(ctx context.Context, e Episode, seed uint64, w Watched) error {
	r := rand.New(rand.NewPCG(seed, e.Seed))
	chain := e.Chain()
	stray := r.IntN(2 * (len(chain) + 1)) // in half of the incidents a scanner comes by
	for i := range len(chain) + 1 {
		for _, v := range e.background(r, i == stray) {
			if err := w.Visit(ctx, v); err != nil {
				return fmt.Errorf("visit %s: %w", v.To, err)
			}
			if err := w.Skip(ctx, time.Duration(100+r.IntN(3000))*time.Millisecond); err != nil {
				return err
			}
		}
		if i == len(chain) {
			break
		}
		repeat := 1
		if chain[i].Plugin == "http" || chain[i].Plugin == "store" {
			repeat += r.IntN(3)
		}
		for range repeat {
			if _, err := w.Attack(ctx, i); err != nil {
				return fmt.Errorf("attack stage %s: %w", chain[i].Name, err)
			}
			if err := w.Skip(ctx, time.Duration(500+r.IntN(20_000))*time.Millisecond); err != nil {
				return err
			}
		}
		if err := w.Release(ctx); err != nil {
			return fmt.Errorf("release: %w", err)
		}
	}
	return nil
}

// ordinary is what clients say; harmless is what they say that looks worse than it is.
var ordinary = map[string][]string{
	Web:   {get("/products?q=lamp"), get("/products?q=chair"), get("/page?file=about"), get("/")},
	Store: {"AUTH store-password\nPING\nQUIT\n"},
	Shell: {"KEY key-of-users\nRUN id\n"},
	Share: {"KEY key-of-users\nRUN id\n"},
	DNS:   {"\x00\x1f\x00\x07\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03www\x04corp\x04test\x00\x00\x01\x00\x01"},
}

var harmless = map[string][]string{
	Web: {get("/products?q=O%27Neill+lamp+or+chair"), get("/page?file=../www/about"), get("/products?q=http://www.corp.test/lamp"),
		"POST /comments HTTP/1.1\r\nHost: shop\r\nContent-Length: 34\r\n\r\nI pasted <script> tags and it works"},
	Store: {"AUTH store-password\nKEYS *\nQUIT\n"},
	Shell: {"PASS tpyo\nPASS Tpyo\nPASS typo\n"},
	Share: {"PASS tpyo\nPASS Tpyo\nPASS typo\n", "KEY key-of-users\nRUN list public\n"},
}

func get(target string) string { return "GET " + target + " HTTP/1.1\r\nHost: shop\r\n\r\n" }

// background draws one to three ordinary visits, one in four of them harmless
// but suspicious, and a scan of one host when a stray comes by.
func (e Episode) background(r *rand.Rand, stray bool) []Visit {
	var out []Visit
	users := UserAddrs()
	for range 1 + r.IntN(3) {
		h, src := hosts[r.IntN(len(hosts))], users[r.IntN(len(users))]
		say := ordinary[h.Service]
		if odd := harmless[h.Service]; odd != nil && r.IntN(4) == 0 {
			say = odd
		}
		out = append(out, Visit{src, h.At(), say[r.IntN(len(say))]})
	}
	if stray {
		h := hosts[r.IntN(len(hosts))]
		for _, port := range []uint16{21, 22, 80, 445, 3306, 8080}[r.IntN(2):] {
			out = append(out, Visit{e.Stray, netip.AddrPortFrom(h.Addr, port), ""})
		}
	}
	return out
}
