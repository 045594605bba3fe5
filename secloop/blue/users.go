package blue

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"trainerd/secloop/scenario"
)

// Users opens n connections to a host as legitimate clients do, all at once,
// and returns how many were served.
func Users(ctx context.Context, stand scenario.Stand, h scenario.Host, n int) int {
	var served atomic.Int32
	from := scenario.UserAddrs()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if User(ctx, stand, from[i%len(from)], h) == nil {
				served.Add(1)
			}
		})
	}
	wg.Wait()
	return int(served.Load())
}

// User is one legitimate client: nil when it got what it came for.
func User(ctx context.Context, stand scenario.Stand, src netip.Addr, h scenario.Host) error {
	c, err := stand.Dial(ctx, src, h.At())
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(userTimeout))
	say, expect := "", ""
	switch h.Service {
	case scenario.Web:
		say, expect = "GET /products?q=lamp HTTP/1.1\r\nHost: shop\r\n\r\n", "lamp"
	case scenario.Store:
		say, expect = "AUTH "+StorePassword+"\nPING\nQUIT\n", "+PONG"
	case scenario.Shell, scenario.Share:
		return login(c)
	case scenario.DNS:
		q := dnsmessage.Message{Header: dnsmessage.Header{ID: 7}, Questions: []dnsmessage.Question{{
			Name: dnsmessage.MustNewName("www.corp.test."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
		m, err := q.Pack()
		if err != nil {
			return err
		}
		say = string(binary.BigEndian.AppendUint16(nil, uint16(len(m)))) + string(m)
		expect = "corp" // an answer; whether it is the true one is the attack's matter
	}
	go io.WriteString(c, say) // answers may begin before all is said
	got, _ := io.ReadAll(io.LimitReader(c, maxBody))
	if !strings.Contains(string(got), expect) {
		return fmt.Errorf("%s answered %.60q", h.Name, got)
	}
	return nil
}

func login(c io.ReadWriter) error {
	r := bufio.NewReaderSize(c, 256)
	if _, err := readLine(r); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "KEY "+UserKey+"\n"); err != nil {
		return err
	}
	if line, err := readLine(r); err != nil || line != "welcome" {
		return fmt.Errorf("login answered %.60q (%v)", line, err)
	}
	_, err := io.WriteString(c, "RUN id\n")
	if err == nil {
		_, err = readLine(r)
	}
	return err
}

// Visit is one connection of background noise; whether it was answered does not matter.
func Visit(ctx context.Context, stand scenario.Stand, v scenario.Visit) {
	c, err := stand.Dial(ctx, v.From, v.To)
	if err != nil {
		return
	}
	defer c.Close()
	if v.Say == "" {
		return
	}
	c.SetDeadline(time.Now().Add(userTimeout))
	go io.WriteString(c, v.Say)
	io.Copy(io.Discard, io.LimitReader(c, maxBody))
}
