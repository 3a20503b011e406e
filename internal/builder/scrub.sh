# Run in the temporary VM by sh -eu, on any distribution.

# Services that write while the file system is read would leave half of what they write.
if [ -d /run/systemd/system ]; then
  for unit in docker.service docker.socket containerd.service cron.service rsyslog.service; do
    systemctl stop "$unit" 2>/dev/null || :
  done
fi

# banger's own blocks: each VM gets its own.
for file in /etc/hosts /root/.ssh/authorized_keys; do
  [ -f "$file" ] || continue
  sed -i '/^# banger: begin/,/^# banger: end$/d' "$file"
  if [ ! -s "$file" ]; then rm -f "$file"; fi
done
rmdir /root/.ssh 2>/dev/null || :

# Lines for disks that VMs do not have: / is mounted already, /home and /var lie on it.
if [ -f /etc/fstab ]; then
  sed -i -E '/^[[:space:]]*[^#[:space:]]+[[:space:]]+(\/|\/home|\/var|none|swap)[[:space:]]/d' /etc/fstab
fi

# Caches, histories, and what the installer of Docker leaves.
if command -v apt-get >/dev/null; then apt-get clean; fi
if command -v npm >/dev/null; then rm -rf /root/.npm/_cacache /root/.npm/_logs; fi
rm -rf /root/.cache /root/.bash_history /root/.ash_history /root/.lesshst /root/.viminfo /root/.wget-hsts /root/.python_history
rm -f /root/get-docker.sh /get-docker.sh /root/install-docker.sh /etc/apt/sources.list.d/*.save /etc/apt/sources.list.d/*.distUpgrade
rm -f /var/lib/systemd/credential.secret /etc/.pwd.lock /etc/passwd- /etc/shadow- /etc/group- /etc/gshadow- /etc/subuid- /etc/subgid-
rm -f /var/lib/docker/engine-id /etc/docker/key.json
find /var/log -type f -delete 2>/dev/null || :

sync
