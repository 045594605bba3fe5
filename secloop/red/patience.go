package red

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"trainerd/secloop/scenario"
)

// pull sends text and reads the answer to its end, as long as it comes fast
// enough: when less than least bytes came in scenario.Patience ticks, or after
// scenario.MostPatience, it gives up and says so. See scenario/throttle.go for why
// patience is counted in ticks.
func pull(c net.Conn, text string, least int) (string, error) {
	defer c.Close()
	go io.WriteString(c, text) // the other side may answer before all is sent
	end := time.Now().Add(scenario.MostPatience)
	var got []byte
	buf := make([]byte, 16<<10)
	fresh := 0 // bytes since patience was full
	for left := scenario.Patience; left > 0 && time.Now().Before(end); left-- {
		tick := time.Now().Add(scenario.PatienceTick)
		if tick.After(end) {
			tick = end
		}
		c.SetReadDeadline(tick) // fails on a connection that has ended: Read says how
		for fresh < least {
			n, err := c.Read(buf)
			got, fresh = append(got, buf[:n]...), fresh+n
			if len(got) >= maxBytes {
				return string(got[:maxBytes]), nil
			}
			if errors.Is(err, io.EOF) {
				return string(got), nil
			}
			if err != nil {
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					return string(got), err
				}
				break
			}
		}
		if fresh >= least {
			fresh, left = 0, scenario.Patience+1
		}
	}
	return string(got), fmt.Errorf("gave up: %d bytes came, then too little", len(got))
}
