package hostnet

// HelperPID returns the number of the helper's process, or 0.
func (c *Client) HelperPID() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.helper == nil {
		return 0
	}
	return c.helper.process.PID()
}
