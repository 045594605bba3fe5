package sensor

import (
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestSummarize(t *testing.T) {
	alert := func(at int, name, source, host string, severity int) Alert {
		return Alert{At: time.Duration(at) * time.Second, Name: name, Source: source, Host: host, Target: "198.18.2.11", Severity: severity}
	}
	alerts := []Alert{
		alert(4, "scan", "198.18.0.9", "web1", 3), alert(1, "scan", "198.18.0.9", "web1", 3), alert(2, "scan", "198.18.0.9", "web2", 3),
		alert(9, "shell", "198.18.0.7", "web1", 1), alert(3, "sql", "198.18.0.7", "", 2),
	}
	want := []Summary{
		{Type: "shell", Count: 1, Source: "198.18.0.7", Target: "web1", From: 9 * time.Second, To: 9 * time.Second, Risk: "high"},
		{Type: "sql", Count: 1, Source: "198.18.0.7", Target: "198.18.2.11", From: 3 * time.Second, To: 3 * time.Second, Risk: "medium"},
		{Type: "scan", Count: 2, Source: "198.18.0.9", Target: "web1", From: time.Second, To: 4 * time.Second, Risk: "low"},
	}
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 1))
	for range 20 { // the order of the alerts does not matter
		if d := cmp.Diff(want, Summarize(alerts, 3)); d != "" {
			t.Fatalf("seed %d: %s", seed, d)
		}
		r.Shuffle(len(alerts), func(i, j int) { alerts[i], alerts[j] = alerts[j], alerts[i] })
	}
	if got := Summarize(alerts, -1); len(got) != 0 {
		t.Errorf("-1 summaries asked for: %v", got)
	}
}

const eveAlert = `{"timestamp":"2026-01-02T15:04:05.500000+0000","event_type":"alert","src_ip":"203.0.113.5","src_port":40000,"dest_ip":"192.0.2.7","dest_port":80,` +
	`"proto":"TCP","alert":{"signature_id":2100498,"signature":"GPL ATTACK_RESPONSE\nid check","category":"Bad","severity":2}}`

func TestReadEVE(t *testing.T) {
	later := strings.Replace(eveAlert, "05.500000+0000", "07.750000+0000", 1)
	got, err := ReadEVE(strings.NewReader(`{"event_type":"flow"}` + "\n\n" + eveAlert + "\n" + later))
	if err != nil {
		t.Fatal(err)
	}
	a := Alert{Signature: 2100498, Name: "GPL ATTACK_RESPONSE id check", Category: "Bad", Severity: 2, Proto: "TCP", Source: "203.0.113.5", Target: "192.0.2.7", SourcePort: 40000, TargetPort: 80}
	b := a
	b.At = 2250 * time.Millisecond
	if d := cmp.Diff([]Alert{a, b}, got); d != "" {
		t.Error(d)
	}
	for _, bad := range []string{"{", "[]", `"x"`, strings.Replace(eveAlert, "203.0.113.5", "host", 1), strings.Replace(eveAlert, "192.0.2.7", "", 1),
		strings.Replace(eveAlert, "2026-01", "2026-13", 1), strings.Repeat("x", maxEVELine+1)} {
		if got, err := ReadEVE(strings.NewReader(bad)); err == nil {
			t.Errorf("%.60q was read as %v", bad, got)
		}
	}
}

func FuzzReadEVE(f *testing.F) {
	f.Add(eveAlert)
	f.Add("{\"event_type\":\"alert\"}\n" + eveAlert)
	f.Fuzz(func(t *testing.T, text string) {
		alerts, err := ReadEVE(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, a := range alerts {
			if a.Severity < 1 || a.Severity > 3 || len([]rune(a.Name)) > maxEVEText || strings.ContainsAny(a.Name+a.Category+a.Proto, "\n\r") {
				t.Errorf("%+v", a)
			}
		}
		Summarize(alerts, 8)
	})
}

var blueNet = Network{
	Host: func(a netip.Addr) string {
		if netip.MustParsePrefix("198.18.2.0/24").Contains(a) {
			return "web1"
		}
		return ""
	},
	Trusted: netip.MustParsePrefix("198.18.1.0/24").Contains,
}

// TestCutsDoNotMatter feeds one conversation in random pieces: the alerts stay the same.
func TestCutsDoNotMatter(t *testing.T) {
	say := "GET /products?q=%27%20UNION%20SELECT%20token-- HTTP/1.1\r\nHost: shop\r\nX-Middleware-Subrequest: a\r\n\r\n"
	red, web := netip.MustParseAddrPort("198.18.0.9:40001"), netip.MustParseAddrPort("198.18.2.11:80")
	run := func(cuts *rand.Rand) []Alert {
		e := NewEngine(blueNet)
		e.Begin(red, web)
		e.Complete(red, web)
		for rest := say; rest != ""; {
			n := len(rest)
			if cuts != nil {
				n = 1 + cuts.IntN(n)
			}
			e.Bytes(red, web, []byte(rest[:n]))
			rest = rest[n:]
		}
		e.Bytes(web, red, []byte("HTTP/1.1 200 OK\r\n\r\nroot:x:0:0"))
		e.End(web, red, false)
		e.End(red, web, false)
		a, _ := e.Alerts()
		return a
	}
	want := run(nil)
	if len(want) != 3 {
		t.Fatalf("%d alerts, expected SQL, header and file: %v", len(want), want)
	}
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 1))
	for range 200 {
		if d := cmp.Diff(want, run(r)); d != "" {
			t.Fatalf("seed %d: %s", seed, d)
		}
	}
}

// TestSignaturesAreNumberedOnce: an id and a name each mean one signature.
func TestSignaturesAreNumberedOnce(t *testing.T) {
	ids, names := map[int]bool{}, map[string]bool{}
	for _, s := range Signatures() {
		if ids[s.ID] || names[s.Name] || s.Severity < 1 || s.Severity > 3 || s.Category == "" {
			t.Errorf("%d %q: twice, or without severity or category", s.ID, s.Name)
		}
		ids[s.ID], names[s.Name] = true, true
	}
}
